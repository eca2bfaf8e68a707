"""The telemetry room: takes batches of records from devices, counts each record once, and shows what has arrived."""
