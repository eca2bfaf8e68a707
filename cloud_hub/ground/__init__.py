"""What every room of the hub stands on: database, audit, identities, problems, metrics, the broker and the link to it.

The ground knows no room. Where it needs one (which certificate belongs to a device that is still welcome), the
composition root hands it a function.
"""
