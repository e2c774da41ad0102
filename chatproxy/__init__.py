"""chatproxy: put Grok on a web page. One key on the server, one event stream per answer."""

__version__ = "0.1.0"
