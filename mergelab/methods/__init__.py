"""Merge methods: a file per method, named as in conf/method."""
