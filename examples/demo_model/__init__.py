"""How the built-in demo model was made, and how anyone makes it again; README.md is its card.

corpus.py        the standard library's sources of this Python, split into training and held-out files
turns.py         functions of a file as turns of a conversation, for the chat template
tokens.py        the byte-level BPE, and documents as ids
network.py       Llama in plain torch, with the tensor names of Hugging Face
team.py          two processes that train as one
train.py         `python -m examples.demo_model.train --out DIR`
ngrams.py        the 5-gram models it is compared with
completions.py   what is asked about held-out functions, and by what the answers are judged
evaluate.py      `python -m examples.demo_model.evaluate`: results.json and, through card.py, the figures of the card
"""
