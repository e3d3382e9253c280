"""The embedded data set and what only it needs: scenes, two small networks, their training, the report.

Nothing of the method is in here. Other files import it only where a name is "shapes".
"""
