"""The Chameleon-style decoder and its feed-forwards; knows no data, tokenizer, configuration or distribution."""
