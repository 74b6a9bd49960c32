"""What a browser or a curl at `/` sees."""

PAGE = """Baton serves {model} here.

POST /v1/chat/completions   OpenAI's chat dialect, streaming or not
POST /v1/completions        OpenAI's completions dialect
GET  /v1/models             the model and its length
POST /tokenize, /detokenize text to token ids and back
GET  /ready                 200 when a request can be answered, else 503 and why
GET  /health                200 while this process lives
GET  /metrics               Prometheus
GET  /status                workers, queues and KV blocks as JSON
GET  /explain/ID            why a request went where it went, by the id of its answer or its X-Request-Id
"""
