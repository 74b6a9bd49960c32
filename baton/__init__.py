"""The command line: thin verbs over the rooms below, each imported when it is called.

    __main__.py     the verbs           serve.py, banner.py     flags to configuration, and the start as it is shown
    chat.py         a conversation      status.py               the workers of a running server
    connection.py   finding a server and talking HTTP to it

What does not belong here: anything that decides (control) or serves (cluster, gateway).
"""
