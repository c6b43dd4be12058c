"""Trained models over HTTP: an API, and a page to look into them."""
