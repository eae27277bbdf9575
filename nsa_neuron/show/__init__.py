"""Which parts of a record influenced an answer: what queries select, as a page and a picture."""

from nsa_neuron.show.page import html
from nsa_neuron.show.picture import picture
from nsa_neuron.show.record import Look, Passage, View, look

__all__ = ["Look", "Passage", "View", "html", "look", "picture"]
