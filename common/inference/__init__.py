"""What a trained model is asked: predictions, and what explains them."""
