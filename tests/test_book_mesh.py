"""The widget of the mesh."""

import browser
import pytest

pytestmark = pytest.mark.browser


def test_a_mesh_is_there(site, chromium):
    address = f"file://{site}/step2_process_group/index.html#mesh?tp=3&dp=2"
    with browser.opened(chromium, address) as (page, problems):
        mesh = browser.ready(page, "#mesh")
        assert browser.number(mesh, "ranks") == "6"
