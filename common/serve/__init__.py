"""Trained models over HTTP: an API, and a page that explains their answers."""
