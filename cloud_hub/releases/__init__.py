"""Releases: uploaded models, the build that quantizes and gates them, signed metadata, and who shall run what.

Other rooms and the composition root use `desk.Desk` and `routes.router`, nothing else from here.
"""
