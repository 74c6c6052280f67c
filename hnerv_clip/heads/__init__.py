"""What is read from the decoder's features: pictures, and embeddings of regions."""
