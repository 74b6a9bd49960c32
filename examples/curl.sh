#!/usr/bin/env bash
# The endpoint with nothing but curl: sh examples/curl.sh [http://127.0.0.1:8000]
set -eu
url=${1:-http://127.0.0.1:8000}

curl -sf "$url/v1/models"
echo

curl -sfN "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "model": "demo",
  "messages": [{"role": "user", "content": "Hello"}],
  "max_tokens": 16,
  "stream": true
}'

curl -sf "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "model": "demo",
  "prompt": "The quick brown fox",
  "max_tokens": 8,
  "temperature": 0
}'
echo

curl -sf "$url/tokenize" -H 'Content-Type: application/json' -d '{"model": "demo", "prompt": "The quick brown fox"}'
echo
