"""Predictions of trained models and their explanations."""
