"""A semantic field: embeddings of any box at any time, fitted on a frozen network."""
