"""Carries out what the core decides: one inbox, one writer of state, every task and timer owned.

    loop.py      the inbox, the tasks and the timers; what starts and stops
    models.py    slots: saves their state, carries out their effects, and says which host answers
    files.py     the files of releases: has them brought in and hashed once more
    bringing.py  how they come: room, budget, patches, once more when they came wrong
    metering.py  the day's bytes, charged on the disk before they are asked for
    hosting.py   model hosts: brings them up, notices when one is lost, probes, stops
    records.py   the near end of the outbox: what happened becomes records, each with its grade
    uplink.py    the link, the outbox's far end (the pump), birth, reports and assignments
    answering.py inference requests: admitted, run, answered by their deadline, recorded
    escalation.py questions to the hub's larger model, and its late answers
    rounds.py    federated runs: tasks fetched and learned, answers kept and then sent; samples taken in
    service.py   what else the door asks: feedback, readings, status, commands
    events.py    what the parts say to each other through the inbox

Nothing here decides. Where a line of this package needs an `if` that is not about a failure, it belongs in the core.
"""
