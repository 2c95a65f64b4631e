"""Which source of topic vectors is right, and which mask makes the most of them?"""
