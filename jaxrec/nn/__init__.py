"""Layers: attention, the BERT encoder, dropout, and the loader of Hugging Face BERT directories."""
