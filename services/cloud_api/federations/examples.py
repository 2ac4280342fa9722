"""Federations as the documentation shows them."""

from cloud_api.devices.examples import TIME
from protocol.federations import Federation, FederationChange, FederationCreate
from protocol.pages import Page

CREATE = FederationCreate(name="hospitals-north", description="The four hospitals of the north")
CHANGE = FederationChange(description="The five hospitals of the north")
FEDERATION = Federation(
    name="hospitals-north", description=CREATE.description, num_devices=4, num_runs=1, created_at=TIME
)
FEDERATIONS = Page[Federation](items=[FEDERATION], next_cursor=None)
