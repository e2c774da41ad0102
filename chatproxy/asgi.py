"""The application for any ASGI server: `uvicorn chatproxy.asgi:app`.

The environment is read when the lifespan starts, not when this module is imported. Draining with a told end, the write
timeout and the bounds on request heads are promises of our own server, `python -m chatproxy`.
"""
