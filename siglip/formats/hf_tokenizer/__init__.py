"""SentencePiece models as Hugging Face tokenizers.

From outside, convert.py is all one needs: `tokenizer_json` and `tokenizer_config` make the two files of a SentencePiece model,
`read_sentencepiece` and `read_pieces` read that model. charsmap.py and lower_case.py are why the ids come out the same.
"""
