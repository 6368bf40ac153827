"""`RaggedArray`: sequences of different lengths, end to end in one array."""
