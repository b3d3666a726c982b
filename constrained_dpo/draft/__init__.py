"""`cdpo new`: a recipe written after a look at a model, its prompts and its scorers."""
