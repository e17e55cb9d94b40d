"""The whole way from raw text to an aligned chat model, small, on a task whose truth is known."""
