"""What a token costs: the service beside nginx and beside itself on stock httpx.

`python -m tests.bench` starts a scripted upstream, the proxies and the load (this process), each on its
own core where there are enough, and prints a table. CPU time is read from the operating system, per process.
"""
