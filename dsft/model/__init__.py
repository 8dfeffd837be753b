"""The model: where its weights and tokenizer come from, how it attends, what of it is trained, how it is written."""
