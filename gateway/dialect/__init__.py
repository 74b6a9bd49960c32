"""OpenAI's dialect over HTTP: what a body may say, what it is refused for, and what an answer looks like."""
