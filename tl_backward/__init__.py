"""Read a language model's backward pass: gradients in vocabulary space, for TransformerLens."""
