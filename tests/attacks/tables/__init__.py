"""The defences by subject."""
