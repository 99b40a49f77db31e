"""Ask a model at a server with the OpenAI chat-completions protocol, keep its answers on disk, and read verdicts in them."""
