"""A larger vocabulary: tokens learnt from text on top of a model's own BPE tokenizer, and a model folder with rows for them."""
