"""SentencePiece models as Hugging Face tokenizers, and back."""
