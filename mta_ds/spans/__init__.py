"""The offline stage: text to sentences, words and constituents in a span store; never imports models or engine."""
