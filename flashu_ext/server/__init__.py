"""Images and answers over HTTP in OpenAI's form, from one model whose requests share steps (docs/serving.md)."""
