/* A small libnvidia-ml.so.1: one board, FAKE_WATTS of constant power, a counter that refreshes every FAKE_REFRESH_MS.
   Tests build it and put it on the loader's path, to measure through NVIDIA's binding as on a real machine. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct { unsigned fieldId, scopeId; long long timestamp, latencyUsec; int valueType, nvmlReturn;
                 union { double d; unsigned ui; unsigned long long ull; } value; } field_t;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char busId[32]; } pci_t;
typedef struct { unsigned long long total, free, used; } memory_t;

enum { OK = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
static const char *UUID = "GPU-fa4e0000-0000-4000-8000-000000000001";
static int users, board;

static double setting(const char *name, double otherwise) {
    const char *text = getenv(name);
    return text ? atof(text) : otherwise;
}
static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}
static unsigned long long energy_mj(void) {
    double refresh_s = setting("FAKE_REFRESH_MS", 20) / 1e3;
    unsigned long long refreshes = now_s() / refresh_s;
    return refreshes * refresh_s * setting("FAKE_WATTS", 300) * 1e3;
}
int nvmlInitWithFlags(unsigned flags) { (void)flags; users++; return OK; }
int nvmlShutdown(void) { return users-- > 0 ? OK : UNINITIALIZED; }
const char *nvmlErrorString(int code) { (void)code; return "an error of the fake library"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "FAKE", size); return OK; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return users ? OK : UNINITIALIZED; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (index) return NOT_FOUND;
    *handle = &board;
    return users ? OK : UNINITIALIZED;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    if (strcmp(uuid, UUID)) return NOT_FOUND;
    *handle = &board;
    return OK;
}
int nvmlDeviceGetName(void *h, char *text, unsigned size) { (void)h; strncpy(text, "FAKE-BOARD", size); return OK; }
int nvmlDeviceGetUUID(void *h, char *text, unsigned size) { (void)h; strncpy(text, UUID, size); return OK; }
int nvmlDeviceGetPciInfo_v3(void *h, pci_t *into) {
    (void)h;
    memset(into, 0, sizeof *into);
    into->bus = 0x18;
    return OK;
}
int nvmlDeviceGetMemoryInfo(void *h, memory_t *into) { (void)h; into->total = 1ull << 36; return OK; }
int nvmlDeviceGetMigMode(void *h, unsigned *a, unsigned *b) { (void)h; *a = *b = 0; return NOT_SUPPORTED; }
int nvmlDeviceGetEnforcedPowerLimit(void *h, unsigned *mw) { (void)h; *mw = 700000; return OK; }
int nvmlDeviceGetClockInfo(void *h, int kind, unsigned *mhz) { (void)h; (void)kind; *mhz = 1980; return OK; }
int nvmlDeviceGetTemperature(void *h, int kind, unsigned *c) { (void)h; (void)kind; *c = 50; return OK; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *h, unsigned long long *bits) { (void)h; *bits = 0; return OK; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *count, void *into) {
    (void)h; (void)into;
    *count = 0;
    return OK;
}
int nvmlDeviceGetFieldValues(void *h, int count, field_t *values) {
    (void)h;
    for (int i = 0; i < count; i++) {
        field_t *one = values + i;
        one->nvmlReturn = OK;
        one->valueType = 3;
        switch (one->fieldId) {
        case 83: one->value.ull = energy_mj(); break;
        case 185:
        case 186:
            one->valueType = 1;
            one->value.ui = setting("FAKE_WATTS", 300) * 1e3;
            break;
        case 74: case 269: case 270: case 271: one->value.ull = 0; break;
        default: one->nvmlReturn = NOT_SUPPORTED;
        }
    }
    return users ? OK : UNINITIALIZED;
}
