"""Do the heads of the meta and representation signals generalise to questions, people and documents held out?"""
