/* Embeds Python, gets the table of functions, and hands it to the simulator. */
#define SHADOWCORE_PYTHON
#include <shadowcore.h>

int simulator_main(const sc_api *api);

int main(void) {
    const sc_api *api;
    PyThreadState *state;
    int status;
    Py_Initialize();
    api = shadowcore_import();
    if (api == NULL) {
        PyErr_Print();
        return 1;
    }
    state = PyEval_SaveThread();
    status = simulator_main(api);
    PyEval_RestoreThread(state);
    return Py_FinalizeEx() == 0 ? status : 1;
}
