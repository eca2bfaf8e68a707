"""The commands of `outrider-agent`, one module each, imported when it is needed.

    parser   what can be typed       exits    which error ends with which code       screen   what is shown
    init enroll run status infer queue model doctor: each has `run(args, loaded) -> int`

Commands other than `run` and `enroll` speak to the running daemon through `edge_agent.client` and change no file.
"""
