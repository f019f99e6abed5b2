/* A call whose instructions callgrind counts, and nothing else: each call makes a profile of its own. The header comes
 * with valgrind; outside of it the requests are a few instructions that do nothing. */
#include <valgrind/callgrind.h>

extern void *PyObject_CallNoArgs(void *callable);

void *bench_measured(void *callable)
{
    void *result;
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
    CALLGRIND_TOGGLE_COLLECT;
    result = PyObject_CallNoArgs(callable);
    CALLGRIND_TOGGLE_COLLECT;
    CALLGRIND_DUMP_STATS;
    CALLGRIND_STOP_INSTRUMENTATION;
    return result;
}
