/* An NVTX tool, loaded through NVTX_INJECTION64_PATH: appends every range's push and pop to the file $NVTX_RECORD.
   Names and numbers are those of the NVTX 3 injection interface. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*function_t)(void);
typedef struct {
  size_t struct_size;
  int (*get_module_function_table)(int module, function_t ***table, unsigned int *size);
} callbacks_t;
typedef struct {
  uint16_t version, size;
  uint32_t category;
  int32_t color_type;
  uint32_t color;
  int32_t payload_type, reserved;
  uint64_t payload;
  int32_t message_type; /* 1: ASCII, 3: registered; a registered string's handle is its copy here */
  const char *message;
} attributes_t;

enum { TABLE_CALLBACKS = 1, MODULE_CORE2 = 5 };
enum { RANGE_PUSH = 4, RANGE_POP = 5, REGISTER_STRING = 10, DOMAIN_CREATE = 12 };

static FILE *out;

static void *create_domain(const char *name) { return strdup(name); }
static void *register_string(void *domain, const char *text) { return strdup(text); }

static int push(void *domain, const attributes_t *event) {
  fprintf(out, "push\t%s\t%s\n", (const char *)domain, event->message);
  fflush(out);
  return 0;
}

static int pop(void *domain) {
  fprintf(out, "pop\t%s\n", (const char *)domain);
  fflush(out);
  return 0;
}

int InitializeInjectionNvtx2(const void *(*get_table)(uint32_t)) {
  const callbacks_t *callbacks = get_table(TABLE_CALLBACKS);
  function_t **table;
  unsigned int size;
  out = fopen(getenv("NVTX_RECORD"), "a");
  if (!out || !callbacks || !callbacks->get_module_function_table(MODULE_CORE2, &table, &size)) return 0;
  *table[RANGE_PUSH] = (function_t)push;
  *table[RANGE_POP] = (function_t)pop;
  *table[REGISTER_STRING] = (function_t)register_string;
  *table[DOMAIN_CREATE] = (function_t)create_domain;
  return 1;
}
