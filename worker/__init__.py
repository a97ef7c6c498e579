"""The process shell that carries roles: the step loop, the link to coordinators, heartbeats, drain.

It must not know which roles it carries.
"""
