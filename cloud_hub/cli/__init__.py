"""The operators' command line, `outrider`: speaks REST to the hub, imports none of its rooms.

__main__   entry: parse, dispatch, turn an error into its message and exit code
arguments  the tree of commands; imports nothing heavy, so that `--help` and completion are instant
exits      exit codes, one table          config   contexts (which hub, which token); the one reader of environment
hub        HTTPS with a pinned CA         answers  the hub's answers as typed values
screen     tables, JSON documents, notes, questions
fleet models releases signing goldens login completion    the commands
"""
