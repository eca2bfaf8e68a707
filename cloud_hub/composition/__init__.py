"""How the hub is put together: what is built from what, by subject. `cloud_hub/main.py` starts and ends it."""
