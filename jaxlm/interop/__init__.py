"""Other people's files: the Hugging Face hub's, and llama.cpp's GGUF."""
