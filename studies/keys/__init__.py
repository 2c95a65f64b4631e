"""Twelve tasks, one bundle each, trained apart: how well does the model itself choose the one to turn on?"""
