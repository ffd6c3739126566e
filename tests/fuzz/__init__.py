# SPDX-License-Identifier: MIT
"""Any server at all, against nbdd's side of the handshake.

    python -m tests.fuzz --seconds 60             look for a server that breaks a promise
    python -m tests.fuzz --runs 1000000 --keep    the same, and keep in corpus.txt what reached something new
    python -m tests.fuzz --replay INPUT           judge one input again: a line of corpus.txt, or what was printed

`judge` holds a negotiation against what it promises, whatever the server does: a result that is exactly what the server
said, or a typed error in a printable sentence; bounded reads, bounded steps, nothing sent that has no place. The whole
client is run, the generators of nbdd.protocol and nbdd.server.connect.negotiate, on a `Wire` in the place of a socket.

`script` makes a server of arbitrary bytes: each byte is a move (a greeting, an info, an entry of a list, an error, a
reply that is crooked somewhere, a repetition, silence) and most moves answer the option that is open. So a fuzzer gets
deep without guessing magic numbers. The limits of nbdd.protocol are lowered for it, or it would hardly ever reach them;
the real ones are tested in tests/unit/test_any_server.py.

`engine` is the process that fuzzes: atheris, which is libFuzzer with the coverage of Python's bytecode. It ends early,
and not with 0, at the first input that fails, takes longer than 10 s or brings the process above 512 MiB.

`corpus` is what is kept: the smallest set of inputs found so far that reaches all that was ever reached. `make check`
judges each of them, and `make test` fuzzes for 60 seconds from there.

The documented run (--runs 1000000 --keep, Python 3.11): 1000000 executions in 173 s, 5780 a second, at most
47 MiB, 237 edges and 998 features; every promise held.
"""
