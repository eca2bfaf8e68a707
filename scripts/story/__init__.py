"""The demo's story: a hub, a real broker and three real agents on loopback, told step by step and checked.

Not part of the product: it drives the product's commands and its local client as a user would.
"""
