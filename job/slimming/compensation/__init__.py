"""Compensation: the kept channels make up for the removed ones."""
