"""The demo: a real collection made on the spot, a fine-tuned model, a rerank, an evaluation."""
