"""Rerank billions of query-document pairs with cross-encoders."""
