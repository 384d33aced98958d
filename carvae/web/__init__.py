"""The local web page: server, jobs and uploads. Its scripts and styles are built from ``src`` into ``assets``."""
