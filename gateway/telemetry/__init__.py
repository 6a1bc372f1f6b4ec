"""Telemetry: what is made of the events that the core reports through `gateway.hooks`.

`compose` puts listeners together; `metrics`, `traces` and `access_log` are the listeners. Import them one by one: each
brings its own library.
"""
